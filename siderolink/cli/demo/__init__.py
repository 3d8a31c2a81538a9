"""`siderolink demo`: a server and two machines in network namespaces of their own, from joining to leaving."""
