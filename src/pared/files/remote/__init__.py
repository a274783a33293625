"""Sources and outputs in object stores."""
