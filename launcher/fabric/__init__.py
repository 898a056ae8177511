"""The fabric between nodes: what its variables mean, what a node gets, what is wrong with a host, what was really used.

Pure: `catalogue`, `environment`, `lint`, `checks`, `attest`, `firewall`. Effects at the edge: `collector` reads a host
(standard library only, so that it also runs piped into a far `python3 -`), `remote` starts it there, `active` runs a
two-rank all-reduce in child processes. Refuses to know: torch, Ray, how a registry is written.
"""
