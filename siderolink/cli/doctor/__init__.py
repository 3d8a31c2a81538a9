"""`siderolink doctor`: checks this host and the path to a server, and suggests a remedy for each failure."""
