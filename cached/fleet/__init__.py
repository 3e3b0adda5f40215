"""What the daemons of a Kubernetes cluster do together: labels on their nodes, and slots for pulls. Opt-in."""
