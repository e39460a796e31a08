"""The client of a service: jobs are submitted, watched and fetched over HTTP, and nothing is computed here.

>>> import equigram
>>> client = equigram.Client("https://equigram.example.org")
>>> job = client.submit("job.yaml")
>>> job.wait().headline
>>> job.gram("C4", "ntk")[:100, :100]                      # (100, 100), only these travel

It needs no package beyond those that equigram is always installed with.
"""

from equigram.client.client import Client
from equigram.client.job import Job
from equigram.client.matrix import RemoteMatrix

__all__ = ["Client", "Job", "RemoteMatrix"]
