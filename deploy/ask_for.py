"""Ask the autoscaler of this machine's Ray cluster for resources, until it is asked for others: `ask_for.py 4 GPU`.

A run uses the machines that a cluster has, and those that join, but never asks for more by itself.
"""

import logging
import sys

import ray
from ray.autoscaler.sdk import request_resources

if __name__ == "__main__":
    count, name = int(sys.argv[1]), sys.argv[2]
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    request_resources(bundles=[{name: 1}] * count)
