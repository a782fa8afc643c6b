"""What each model's decode takes on this machine's processor, beside its peers."""
