"""cacp_ray: conditional automated channel pruning of CNNs on Ray."""
