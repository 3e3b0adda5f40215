"""HTTP as the origins need it: connections, ranged reads into the caller's memory, errors. Knows no concrete origin."""
