"""How fast the layers are beside what else computes them: ``python -m benchmarks``.

- ``cases``: what is computed (layers and networks, candidates, shapes, suites);
- ``peers``: how a candidate is made ready (compiled, frozen, in ONNX Runtime);
- ``limits``: what this machine can do at best; ``limits.cpp`` is its compiled half;
- ``measure``: one case, verified against ``mylayers.reference``, then timed;
- ``timing``: candidates that take turns;
- ``machine``: what it ran on;
- ``record``: what a run has measured so far, written as it goes;
- ``report``: tables and summaries;
- ``pictures``: what is read in ten seconds;
- ``publish``: what of it is kept in the repository, and the pages that show it;
- ``__main__``: the command line.
"""
