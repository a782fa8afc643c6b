"""The launcher, `remote-vae-serve run`: Serve in a session of its own, probed at its start, drained at its end."""
