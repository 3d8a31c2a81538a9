"""`siderolink demo`: a server and two machines in temporary network namespaces, from joining to leaving."""
