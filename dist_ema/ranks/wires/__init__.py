"""Messages from one rank to another, over sockets that are opened when needed."""
