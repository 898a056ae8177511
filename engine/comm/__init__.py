"""How ranks and their engine reach one another: rings, collectives, links; never pickle, never a name in /dev/shm."""
