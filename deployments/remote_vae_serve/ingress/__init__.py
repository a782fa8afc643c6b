"""The ingress deployment: the models of the cluster, their states, and who waits for which resource."""
