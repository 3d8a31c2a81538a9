"""Messages of another implementation of protobuf, written down once more and not taken from our own sources."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
}


def messages(schema: dict[str, str]) -> dict[str, Any]:
    """Message classes by name; a field is written ``number:name:type``, with ``*`` before the type where it is repeated.

    Enumerations are int32, and maps are what they are on the wire: repeated entries of a key and a value.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"{id(schema)}.proto", package="wire", syntax="proto3")
    for name, fields in schema.items():
        message = file.message_type.add(name=name)
        for text in fields.split():
            number, field_name, kind = text.split(":")
            field = message.field.add(name=field_name, number=int(number))
            field.label = _Field.LABEL_REPEATED if kind.startswith("*") else _Field.LABEL_OPTIONAL
            kind = kind.lstrip("*")
            field.type = _TYPES.get(kind, _Field.TYPE_MESSAGE)
            if field.type == _Field.TYPE_MESSAGE:
                field.type_name = f".wire.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"wire.{name}")) for name in schema}
