"""int8 counterparts: modules that stand in for float ones, and the table of the layers that have one."""
