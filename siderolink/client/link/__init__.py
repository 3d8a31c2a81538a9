"""The life of one link: provision, connect, monitor, reconnect, and change settings without losing the link that works."""
