"""Adapters that were trained apart, put under the hierarchy afterwards."""
