"""From a model's call to a graph of operators that change none of their inputs."""
