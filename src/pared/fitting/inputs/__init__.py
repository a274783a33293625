"""What layers get: the second moments of their inputs."""
