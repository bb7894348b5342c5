"""
Declare the Docker image that every Synapse process runs in.
"""

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "synapse_image"


def __virtual__():
    return __virtualname__


def present(name, image):
    """
    Ensure that the image is there, made of what ``image`` says, works, and has its byte code.

    It is pulled, or built and extended, when and only when it is missing or its inputs changed.
    Changes are the ids of images, by reference, and the volume that was filled with byte code.

    name
        The reference that containers run, as from ``synapse_image.references``.

    image
        The image's settings, a mapping as shown on top of the execution module.
    """
    ret = {"name": name, "result": True, "comment": "The image is as specified", "changes": {}}
    try:
        reference = __salt__["synapse_image.references"](image)["wanted"]
        if name != reference:
            raise SaltInvocationError(f"The settings make {reference}, which is not {name}")

        if __opts__["test"]:
            ret["changes"] = __salt__["synapse_image.pending"](image)
            if ret["changes"]:
                ret["result"] = None
                ret["comment"] = "The image would be brought about"
            return ret

        ret["changes"] = __salt__["synapse_image.ensure"](image)
        if ret["changes"]:
            ret["comment"] = "The image has been brought about"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret["result"] = False
        ret["comment"] = str(err)
    return ret


def absent(name, image):
    """
    Ensure that no image is left that was built here, nor the pulled one, nor their byte code.

    What a container uses is left, and named in the comment. A test run supposes that those of Synapse's processes are
    gone by then.

    name
        A name for this, which can be any.

    image
        The image's settings, a mapping as shown on top of the execution module.
    """
    ret = {"name": name, "result": True, "comment": "No image is left", "changes": {}}
    try:
        if __opts__["test"]:
            targets = __salt__["synapse_image.removable"](image, without_processes=True)
        else:
            targets = __salt__["synapse_image.remove"](image)
        ret["changes"] = {
            **{ref: {"old": found, "new": None} for ref, found in targets["images"].items()},
            **{volume: {"old": volume, "new": None} for volume in targets["volumes"]},
        }
        if ret["changes"]:
            ret["comment"] = "The images would be removed"
            ret["result"] = None
            if not __opts__["test"]:
                ret["comment"] = "The images have been removed"
                ret["result"] = True
        if targets["used"]:
            ret["comment"] += f"; left, as containers use them: {', '.join(targets['used'])}"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret["result"] = False
        ret["comment"] = str(err)
    return ret
