"""The services of one replica: frames of clerks, hand-overs, access, views. One replica, no process."""
