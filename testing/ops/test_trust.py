"""Whose files are believed: this user's and root's, where nobody else can write."""

import os
from types import SimpleNamespace

import pytest

from arbitor.ops import trust
from arbitor.ops.trust import why_untrusted

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs owners and modes of files")


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o700)
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    (folder / "file").write_text("x")
    (folder / "file").chmod(0o644)
    return folder


@pytest.fixture
def groups_are_shared(monkeypatch):
    monkeypatch.setattr(trust, "_is_own_group", lambda _: False)


def test_what_only_the_user_writes_is_trusted(folder):
    assert why_untrusted(folder / "file") is None
    assert why_untrusted(folder / "absent" / "deeper") is None


@pytest.mark.parametrize("place", ["folder/file", "folder", "."])
@pytest.mark.parametrize(("mode", "words"), [(0o777, "everybody may write to"), (0o770, "the group of")])
def test_what_others_may_write_to_is_not(folder, groups_are_shared, place, mode, words):
    shared = folder.parent / place
    shared.chmod(mode)
    assert words in why_untrusted(folder / "file")
    assert str(shared) in why_untrusted(folder / "file")


def test_a_folder_where_only_owners_remove_is_trusted_above_but_not_itself(folder, groups_are_shared):
    folder.chmod(0o1777)
    assert why_untrusted(folder / "file") is None
    assert "everybody may write" in why_untrusted(folder)


def test_other_owners_are_not_trusted(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    owner = (folder / "file").stat().st_uid
    reason = why_untrusted(folder / "file")
    assert (reason is None) if owner == 0 else ("belongs to another user" in reason)
    if owner == 0 and os.getuid() == 0:
        os.chown(folder, 54321, -1)
        assert why_untrusted(folder / "file") == f"{folder} belongs to another user"


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="needs root, who may give files away")
def test_folders_of_a_containers_unknown_users_are_trusted_above_but_files_are_not(folder):
    os.chown(folder, trust.NOBODY, -1)
    assert why_untrusted(folder / "file") is None
    os.chown(folder / "file", trust.NOBODY, -1)
    assert why_untrusted(folder / "file") == f"{folder / 'file'} belongs to another user"


def test_a_link_leads_to_what_is_looked_at(folder, groups_are_shared):
    link = folder / "link"
    link.symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").mkdir()
    assert why_untrusted(link / "file") is None
    (folder.parent / "elsewhere").chmod(0o777)
    assert "elsewhere" in why_untrusted(link / "file")


@pytest.mark.parametrize(
    ("name", "members", "primary", "own"),
    [("me", [], 7, True), ("me", ["me"], 7, True), ("me", ["you"], 7, False), ("users", [], 7, False),
     ("me", [], 8, False)],
)  # fmt: skip
def test_a_group_of_the_users_own_name_is_the_user(monkeypatch, name, members, primary, own):
    import grp
    import pwd

    user = SimpleNamespace(pw_name="me", pw_gid=primary)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=name, gr_mem=members))
    assert trust._is_own_group(7) is own


def test_the_kernel_cache_is_made_for_the_user_alone_and_refused_where_it_is_shared(tmp_path):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    from arbitor.errors import UserError
    from arbitor.ops.triton import refuse_shared_cache

    tmp_path.chmod(0o700)
    cache = tmp_path / "a" / "cache"
    refuse_shared_cache(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    refuse_shared_cache(cache)
    cache.chmod(0o777)
    with pytest.raises(UserError, match=r"would run as you, but everybody may write to .*TRITON_CACHE_DIR"):
        refuse_shared_cache(cache)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make .*set TRITON_CACHE_DIR"):
        refuse_shared_cache(tmp_path / "file")
