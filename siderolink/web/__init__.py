"""The page: what a browser shows of a server, and does with it. A client of the admin API in a process of its own."""
