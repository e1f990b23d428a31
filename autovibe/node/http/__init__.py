"""How the node is talked to: HTTPS, websockets, and the way from a request to a verb."""
