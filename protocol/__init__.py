"""What Tandem's processes say to each other: messages, their encoding, sockets, sampling parameters, errors.

Imports nothing else of Tandem, so that every process can speak without carrying another's dependencies.
"""
