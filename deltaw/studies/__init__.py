"""Whole stories told with several rooms: a training job, quickstart."""
