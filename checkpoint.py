"""
Checkpoints: sharded, and written while training continues. A folder is complete once it is named after its step.

    out_dir/ckpt/2500/         one file per rank and .metadata (torch.distributed.checkpoint); loads on any rank count
    out_dir/ckpt/unfinished/   being written, or left by a stop; the next run deletes it

A save waits only while each rank copies its own shards to host memory. Then a thread writes them. It has a gloo group
of its own, because collectives of two threads must not meet in training's group. No tensor is gathered anywhere: 16
bytes per parameter over all ranks (student, teacher, two moments), as many in host memory, none on the device. Rank 0
renames the folder when every rank has written and synced its file, and deletes older ones only then. So whenever a run
is killed, the newest complete checkpoint is whole.
"""
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from rundir import agree, complete, on_rank_0, one_line


def tensors(nets, optimizer):
    """
    Weights and moments to save, or to load into: they are the run's own, not copies. The optimizer's parameter groups
    are not saved, because a resumed run follows its own keys (betas, layer_decay).
    """
    trained = {name: p for name, p in nets.named_parameters() if p.requires_grad}
    assert len(trained) == len(optimizer.state), (len(trained), len(optimizer.state))
    moments = {name: optimizer.state[p] for name, p in trained.items()}
    return {"model": nets.state_dict(), "optimizer": {"state": moments}}


def delete_old(folder, steps, ending, keep, keep_every, say):
    """
    Of what `folder` holds, <step><ending> for sorted steps, delete all except the newest `keep` (0 = all) and multiples
    of `keep_every` (0 = none). That something cannot be deleted is said, and costs a run nothing else.
    """
    for step in needless(steps, keep, keep_every):
        path = f"{folder}/{step}{ending}"
        try:
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        except OSError as e:
            say(f"{path} is not needed any more and cannot be deleted: {one_line(e)}")


def needless(steps, keep, keep_every):
    """Of sorted steps, those that are neither among the newest `keep` (0 = all) nor multiples of `keep_every`."""
    older = steps[:-keep]  # an empty list for keep = 0
    return [step for step in older if not keep_every or step % keep_every]


class Saver:
    """Saves to a folder, one at a time. Keeps the newest `keep` (0 = all) and multiples of `keep_every` (0 = none)."""

    def __init__(self, folder, keep, keep_every, say=print):
        self.folder, self.keep, self.keep_every, self.say = folder, keep, keep_every, say
        self.unfinished, self.last = f"{folder}/unfinished", "what was saved before"
        self.group, self.thread, self.running = dist.new_group(backend="gloo"), ThreadPoolExecutor(1), None

        def clear():  # now, so that a folder that cannot be written is named before the first step
            shutil.rmtree(self.unfinished, ignore_errors=True)
            os.makedirs(self.unfinished, exist_ok=True)

        on_rank_0(f"{self.unfinished} cannot be made", clear)

    def save(self, step, state):
        """
        Begin to save `state`, which may change as soon as this returns. A collective: every rank calls it at the same
        step. Waits for the previous save, and ends the run if that failed.
        """
        self.finish()
        written = dcp.async_save(state, checkpoint_id=self.unfinished, process_group=self.group)
        self.running = self.thread.submit(self.number, step, written)

    def number(self, step, written):
        """Runs in the thread: rename when all is written, then delete what is not to be kept."""
        written.result()
        if dist.get_rank() != 0:
            return
        for place in dcp.FileSystemReader(self.unfinished).read_metadata().storage_data.values():
            if not os.path.exists(f"{self.unfinished}/{place.relative_path}"):
                raise OSError(f"{place.relative_path} of another rank is not there")
        shutil.rmtree(f"{self.folder}/{step}", ignore_errors=True)  # of a run that was here before
        os.replace(self.unfinished, f"{self.folder}/{step}")
        self.last = f"{self.folder}/{step}"
        self.say(f"saved: {self.last}")
        delete_old(self.folder, complete(self.folder), "", self.keep, self.keep_every, self.say)

    def finish(self):
        """Wait for the running save. If it failed on a rank, all end, and name the checkpoint before. A collective."""
        what = f"{self.last} is whole, but {self.unfinished} could not be written"
        agree(what, lambda: self.running and self.running.result())


class Exactly(dcp.DefaultLoadPlanner):
    """Loads if file and run have the same names and shapes. Otherwise ends the run before anything is read."""

    def create_local_plan(self):
        saved = {name: tuple(getattr(m, "size", ())) for name, m in self.metadata.state_dict_metadata.items()}
        mine = {name: tuple(getattr(t, "shape", ())) for name, t in self.state_dict.items()}
        for name in sorted(saved | mine):
            if saved.get(name) != mine.get(name):
                raise SystemExit(f"{name} is {saved.get(name, 'missing')}, this run needs {mine.get(name, 'none')}; go "
                                 "back to its keys of the network (config.json), or start anew in another --out_dir")
        return super().create_local_plan()


def load(folder, state, say):
    """
    Fill `state` in place from the newest checkpoint that loads, on any number of ranks, and return its step. Newer ones
    that are damaged are renamed <step>.damaged, so that they do not count as kept. All ranks end if none loads, or if
    one that could be whole cannot be read or is of another network. A collective.
    """
    # rank 0 decides: what other nodes list may be older
    steps = on_rank_0(f"{folder} cannot be read", lambda: complete(folder, say))
    damaged = {}
    for path in [f"{folder}/{step}" for step in reversed(steps)]:
        agree(f"{path} cannot be read", lambda: open(f"{path}/.metadata", "rb").close())
        try:
            dcp.load(state, checkpoint_id=path, planner=Exactly())
            break
        except CheckpointException as e:
            for cause, _ in e.failures.values():
                damaged[path] = f"{path} does not load: {one_line(cause)}"
                if isinstance(cause, SystemExit):
                    raise SystemExit(f"{path} does not load: {cause}") from None
                if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                    raise SystemExit(f"{path} may be whole, but cannot be read ({cause}): mend that") from None
    else:
        newest = next(iter(damaged.values()), "there is no checkpoint")
        raise SystemExit(f"{newest}; nothing else in {folder} loads: start anew in another --out_dir")

    def set_aside():
        for path, why in damaged.items():
            shutil.rmtree(f"{path}.damaged", ignore_errors=True)
            os.replace(path, f"{path}.damaged")
            say(f"{why}; it is now called {path}.damaged")

    on_rank_0(f"a damaged checkpoint in {folder} cannot be renamed", set_aside)
    return steps[-1 - len(damaged)]


def export(folder, tensors, header, keep=0, keep_every=0, say=print):
    """
    folder/<step>.pth for load_backbone, from pairs (name, tensor) that are whole on rank 0: {"teacher": ..., **header}.
    Then deletes older ones as Saver does; those of later steps, which a resumed run writes again, stay. A collective,
    as `tensors` is.
    """
    whole, unfinished, now = dict(tensors), f"{folder}/unfinished", header["step"]

    def write():
        os.makedirs(folder, exist_ok=True)
        torch.save({"teacher": whole, **header}, unfinished)
        os.replace(unfinished, f"{folder}/{now}.pth")
        steps = [int(name[:-4]) for name in os.listdir(folder) if re.fullmatch(r"(0|[1-9]\d*)\.pth", name)]
        delete_old(folder, sorted(step for step in steps if step <= now), ".pth", keep, keep_every, say)
    on_rank_0(f"{unfinished} could not be written", write)
