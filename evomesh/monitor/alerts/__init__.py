"""Tell people outside about a run: spikes, hangs, crashes, a full disk, its end.

AlertCenter.raise_alert(kind, text)    center.py    limits the rate; returns at once
  |
BackgroundSender, one per channel      sender.py    bounded queue and thread; failures are logged once
  |
AlertChannel.send(alert)               channels.py  chooses one by its type: chat.py, mail.py, files.py, custom

Nothing here imports torch: a process beside the run can raise alerts too.
"""
