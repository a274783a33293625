"""One module per family of peers, each with a table `PEERS`; each runs in the environment of its family."""
