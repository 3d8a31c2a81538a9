"""The web UI: shows a server in a browser and manages it. A client of the admin API in a separate process."""
