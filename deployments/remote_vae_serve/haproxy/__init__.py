"""HAProxy as we want it: the program by which Serve starts it, and what that writes into its configuration."""
