"""`siderolink doctor`: checks this host and the way to a server, and suggests a remedy for each failure."""
