"""The application with a tiny model and a log of events, by itself: python event_server.py BUNDLE FOLDER PORT."""

import sys

import uvicorn

from seqray.bundle import Bundle
from seqray.recommender import Recommender
from seqray.serve_config import EventsConfig
from serve.application import build_application
from serve.event_buffer import open_buffer
from serve.served_model import ServedModel
from serve.service import Service

if __name__ == "__main__":
    bundle, folder, port = sys.argv[1:]
    model = ServedModel(Recommender(Bundle.load(bundle)), "tiny", "champion", 4)
    service = Service("tiny", model)
    service.events = open_buffer(EventsConfig(folder=folder), 1)
    service.warm_up()
    uvicorn.run(build_application(service), host="127.0.0.1", port=int(port), log_level="error")
