"""How the actor pool hands out shards, with stand-ins for Ray's actors; tests/integration runs it on Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from motionrft.core.errors import ConfigError, DataError
from motionrft.runtime import executor as module
from motionrft.runtime.executor import RayExecutor


class Reference:
    """A result to be: computed when it is waited for."""

    def __init__(self, actor: Actor, work: Callable[[], Any], starts: bool) -> None:
        self.actor, self.work, self.starts = actor, work, starts


class Actor:
    """Runs one method at a time and remembers what it ran."""

    def __init__(self, ray: FakeRay) -> None:
        self.ray, self.shards, self.placed = ray, [], len(ray.actors) < ray.room
        self.ready, self.call = Method(self, lambda: None), Method(self, self._call)

    def _call(self, fn: Callable[[Any], Any], shard: Any) -> Any:
        self.shards.append(shard)
        return fn(shard)


class Method:
    def __init__(self, actor: Actor, fn: Callable[..., Any]) -> None:
        self.actor, self.fn = actor, fn

    def remote(self, *args: Any) -> Reference:
        return Reference(self.actor, lambda: self.fn(*args), starts=not args)


class FakeRay:
    """What the executor asks of ray; actors start in order, then the latest shard is the first to finish."""

    def __init__(self, room: int = 99) -> None:
        self.room = room
        self.actors: list[Actor] = []
        self.killed: list[Actor] = []
        self.options: dict[str, Any] = {}

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: list[Reference], num_returns: int) -> tuple[list[Reference], list[Reference]]:
        assert len({id(r.actor) for r in references}) == len(references), "an actor got two shards at once"
        able = [r for r in references if r.actor.placed]
        assert able, "waits for ever"
        first = next((r for r in able if r.starts), able[-1])
        return [first], [r for r in references if r is not first]

    def get(self, reference: Reference) -> Any:
        try:
            return reference.work()
        except DataError as error:
            raise RayTaskError("call", "traceback", error) from error

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)

    def start(self, **options: Any) -> FakeRay:
        self.options = options
        return self

    def remote(self) -> Actor:
        self.actors.append(Actor(self))
        return self.actors[-1]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    def make(**settings: Any) -> FakeRay:
        ray = FakeRay(**settings)
        monkeypatch.setattr(module, "ray", ray)
        monkeypatch.setattr(module, "_Worker", type("_Worker", (), {"options": staticmethod(ray.start)}))
        return ray

    return make


def test_results_keep_the_order_of_the_shards_and_actors_stay_warm(pool: Callable[..., FakeRay]) -> None:
    ray, executor = pool(), RayExecutor(3, cpus=0.5, gpus=0.25, max_retries=1)
    assert executor.map_shards(lambda n: n * n, list(range(7))) == [n * n for n in range(7)]
    assert len(ray.actors) == 3 and sorted(s for a in ray.actors for s in a.shards) == list(range(7))
    executor.map_shards(lambda n: n, [7, 8])
    assert len(ray.actors) == 3  # the same processes, with whatever they have loaded
    assert ray.options == {"num_cpus": 0.5, "num_gpus": 0.25, "max_restarts": 1, "max_task_retries": 1}
    assert executor.map_shards(lambda n: n, []) == [] and ray.killed == []


def test_no_more_actors_start_than_there_are_shards(pool: Callable[..., FakeRay]) -> None:
    ray, executor = pool(), RayExecutor(8)
    executor.map_shards(lambda n: n, [1, 2])
    assert len(ray.actors) == 2
    executor.map_shards(lambda n: n, [1, 2, 3])
    assert len(ray.actors) == 3
    with pytest.raises(ConfigError, match="num_workers"):
        RayExecutor(0)


def test_a_shard_starts_after_the_one_it_needs(pool: Callable[..., FakeRay]) -> None:
    pool()
    seen: list[int] = []
    RayExecutor(2).map_shards(seen.append, [0, 1, 2, 3], after=[None, None, 0, 2])
    assert sorted(seen) == [0, 1, 2, 3] and seen.index(0) < seen.index(2) < seen.index(3)
    with pytest.raises(ValueError, match="earlier"):
        RayExecutor(2).map_shards(seen.append, [0, 1], after=[1, None])


def test_shards_do_not_wait_for_an_actor_the_cluster_has_no_room_for(pool: Callable[..., FakeRay]) -> None:
    ray = pool(room=1)
    assert RayExecutor(3).map_shards(lambda n: -n, [1, 2, 3, 4]) == [-1, -2, -3, -4]
    assert [len(a.shards) for a in ray.actors] == [4, 0, 0]


def test_our_errors_come_back_and_what_still_ran_is_ended(pool: Callable[..., FakeRay]) -> None:
    ray, executor = pool(), RayExecutor(3)

    def broken(shard: int) -> int:
        if shard == 2:
            raise DataError(f"clip {shard} is broken")
        return shard

    with pytest.raises(DataError, match="clip 2 is broken"):
        executor.map_shards(broken, [0, 1, 2, 3])
    assert len(ray.killed) == 2 and ray.killed[0] is not ray.killed[1]  # shards 0 and 1 were running
    assert executor.map_shards(lambda n: n, [0, 1, 2]) == [0, 1, 2]
    assert len(ray.actors) == 5 and not any(a.shards for a in ray.killed)
