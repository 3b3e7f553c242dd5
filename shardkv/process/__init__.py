"""One server process: its options, identity, certificates, stores and listeners; and a whole cluster of processes on one machine."""
