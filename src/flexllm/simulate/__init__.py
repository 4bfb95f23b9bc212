"""The real scheduler on a virtual clock: what a model, a device and a load would make of each other. No torch here."""
