"""Short measurements of this host, through the code that moves models; for `cached doctor` and `cached bench`.

Each is bounded in bytes and in time, and leaves nothing behind, however it ends short of SIGKILL.
"""
