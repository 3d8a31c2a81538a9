"""`siderolink doctor`: what works on this host and towards a server, and what to do where it does not."""
