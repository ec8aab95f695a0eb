from pathlib import Path

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.location import Url, locate, without_credentials


@pytest.mark.parametrize("name", ["shards/a.tar", "/x/y:z/a.tar", "a.tar", Path("b")])
def test_what_has_no_scheme_is_local(name):
    assert locate(name) == Path(name)


def test_file_urls_are_local():
    assert locate("file:///x/a.tar") == Path("/x/a.tar")


def test_an_address_has_the_parts_of_a_path():
    url = locate("s3://bucket/a.b/shard-000000.tar")
    assert isinstance(url, Url) and str(url) == "s3://bucket/a.b/shard-000000.tar"
    assert (url.scheme, url.name, str(url.parent)) == ("s3", "shard-000000.tar", "s3://bucket/a.b")
    assert url.parent / "shard-000000.tar" == Url("s3://bucket/a.b/") / "shard-000000.tar" == url
    assert str(url.with_suffix(".index.json")) == "s3://bucket/a.b/shard-000000.index.json"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pipe:cat a.tar", "is not opened"),
        ("ftp://host/a.tar", "is not opened"),
        ("HTTP://host/a.tar", "is not opened"),
        ("http:a.tar", "is not opened"),
        ("htttp://host/a.tar", "did you mean 'http'"),
        ("simplecache::http://host/a.tar", "is not opened"),
        ("http://host/a.tar::pipe:x", "is not opened"),
        ("a::b", "is not opened"),
    ],
)
def test_other_schemes_and_chains_are_refused_with_the_list(name, said):
    with pytest.raises(UserError, match=said) as error:
        locate(name)
    assert "file://, memory://, http://, https://, s3://, gs://, az://, abfs://, hf://" in str(error.value)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://me:secret@host/a.tar", "https://host/a.tar: "),
        ("s3://secret@bucket/a.tar", "s3://bucket/a.tar: "),
        ("https://host/a.tar?sig=secret", "https://host/a.tar: "),
        ("https://host/a.tar#secret", "https://host/a.tar: "),
        ("az://user:secret@account/a.tar", "az://account/a.tar: "),
        ("ftp://me:secret@host/a.tar", "ftp://host/a.tar: "),
    ],
)
def test_credentials_are_refused_and_not_repeated(name, shown):
    with pytest.raises(UserError) as error:
        locate(name)
    assert str(error.value).startswith(shown) and "secret" not in str(error.value)


def test_containers_of_azure_and_revisions_of_a_hub_are_no_credentials():
    for name in ("abfs://container@account.dfs.core.windows.net/a.tar", "hf://datasets/me/set@main/a.tar"):
        assert str(locate(name)) == name


def test_a_text_loses_the_credentials_of_its_urls():
    text = "403, url='https://me:secret@cdn.org/a/b.tar?X-Amz-Signature=secret&b=secret' and s3://k:secret@b/c"
    assert without_credentials(text) == "403, url='https://cdn.org/a/b.tar' and s3://b/c"
    assert without_credentials("a?b @ c.tar") == "a?b @ c.tar"
