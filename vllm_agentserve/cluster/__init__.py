"""Several engines behind one address: Ray Serve runs them and carries requests, `policy/placement.py` says which goes where.

A request passes two processes. The ingress (`ingress.py`) reads whose it is and hands it to Ray's router for the engines
(`router.py`), which asks the table of pins (`table.py`) where it does not know. The engine's process (`server.py`) has a whole
`vllm serve` of its own, which answers on a Unix socket. Importing this package does not import Ray.
"""
