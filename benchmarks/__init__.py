"""How fast the layers are beside what else computes them: ``python -m benchmarks``.

- ``cases``: what is computed (layers, candidates, shapes, suites);
- ``measure``: one case, verified against ``mylayers.reference``, then timed;
- ``timing``: candidates that take turns;
- ``machine``: what it ran on;
- ``report``: tables, CSV, JSON and plot;
- ``__main__``: the command line.
"""
