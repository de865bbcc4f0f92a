"""The parts of `jobs.make_emulator`: settings, identity, one night's work, the bundle, records and report."""
