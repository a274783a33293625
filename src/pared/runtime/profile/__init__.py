"""What is fastest on this machine, as it was measured."""
