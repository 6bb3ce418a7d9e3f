"""Write down how a run is doing: log, metrics, TensorBoard, live progress line, profile, alerts.

StepRecord      figures of one step (metrics.py)
  |-- line()    -> log.py             terminal and logs/RANK.log in the run folder (run_folder.py)
  |-- values()  -> metrics.py         MetricsFile: metrics.jsonl, one object per step
  |             -> tensorboard.py     TensorBoardWriter: scalars
  +-- loss, tgs -> progress.py        ProgressLine, on a terminal

RankStatus      -> status.py          what a rank is doing, rewritten once a second; evomesh top reads it by overview.py
Alert           -> alerts             Feishu, Slack, e-mail ...

region(kind)    -> profile.py         StepProfile: trace files and a table of where the time goes
"""
