"""How far an average and each of its tracks have come."""
