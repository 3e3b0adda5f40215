"""The engine on a simulated machine: virtual time, disk, movers and origins, all of them from one seed."""
