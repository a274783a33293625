"""int8 counterparts: modules that stand in for float ones, and the table of what they can stand in for."""
