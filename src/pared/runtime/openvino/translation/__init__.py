"""A captured graph as a graph of OpenVINO."""
