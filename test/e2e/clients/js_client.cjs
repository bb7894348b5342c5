// Two people with matrix-js-sdk do what people do, in rooms of one version, and each sees what the other did. Alice syncs as of
// v3, Bob by simplified sliding sync.
//
//     js_client.cjs URL ROOM_VERSION USER_AGENT

const assert = require("node:assert");
const { randomBytes } = require("node:crypto");
const { setTimeout: sleep } = require("node:timers/promises");
const sdk = require("matrix-js-sdk");
const { SlidingSync } = require("matrix-js-sdk/lib/sliding-sync.js");

const [baseUrl, roomVersion, userAgent] = process.argv.slice(2);

const fetchFn = (url, options) => fetch(url, { ...options, headers: { ...options.headers, "User-Agent": userAgent } });

async function until(condition, what) {
    for (const deadline = Date.now() + 30_000; Date.now() < deadline; await sleep(50)) {
        const found = await condition();
        if (found) return found;
    }
    throw new Error(`not within 30 s: ${what}`);
}

async function registerAndLogIn() {
    const [username, password] = [`js-${randomBytes(6).toString("hex")}`, randomBytes(8).toString("hex")];
    const newcomer = sdk.createClient({ baseUrl, fetchFn });
    const registered = await newcomer.register(username, password, null, { type: "m.login.dummy" });
    newcomer.setAccessToken(registered.access_token);
    await newcomer.logout();
    const login = await newcomer.loginWithPassword(username, password);
    const client = sdk.createClient({
        baseUrl, fetchFn, userId: login.user_id, deviceId: login.device_id, accessToken: login.access_token,
    });
    await client.initRustCrypto({ useIndexedDB: false });
    await client.setDisplayName(username.toUpperCase());
    return client;
}

async function meet(alice, bob, more = {}) {
    const { room_id: room } = await alice.createRoom({ room_version: roomVersion, invite: [bob.getUserId()], ...more });
    await bob.joinRoom(room);
    await until(() => alice.getRoom(room)?.getMember(bob.getUserId())?.membership === "join", "alice sees bob join");
    await until(() => bob.getRoom(room)?.getMyMembership() === "join", "bob sees that he joined");
    return room;
}

async function talk(alice, bob, room) {
    const { event_id: said } = await alice.sendTextMessage(room, "good morning");
    const reads = (text) => () => bob.getRoom(room).findEventById(said)?.getContent().body === text;
    await until(reads("good morning"), "bob reads what alice said");

    const better = { msgtype: "m.text", body: "good evening" };
    const edited = { ...better, "m.new_content": better, "m.relates_to": { rel_type: "m.replace", event_id: said } };
    const { event_id: edit } = await alice.sendMessage(room, edited);
    await until(reads("good evening"), "bob reads the edit in its place");

    await bob.sendTyping(room, true, 20_000);
    await until(() => alice.getRoom(room).getMember(bob.getUserId()).typing, "alice sees bob type");

    await bob.sendReadReceipt(bob.getRoom(room).findEventById(said));
    const upTo = (event) => () => alice.getRoom(room).getEventReadUpTo(bob.getUserId(), true) === event;
    await until(upTo(said), "alice sees what bob read");
    await bob.setRoomReadMarkers(room, edit, await until(() => bob.getRoom(room).findEventById(edit), "bob has the edit"));
    await until(upTo(edit), "alice sees that bob read the edit");

    const { chunk } = await bob.createMessagesRequest(room, null, 50, "b");
    assert(chunk.some((event) => event.event_id === said));
}

async function settings(alice, bob, room) {
    await bob.setPresence({ presence: "unavailable", status_msg: "at lunch" });
    await until(() => alice.getUser(bob.getUserId())?.presenceStatusMsg === "at lunch", "alice sees bob's presence");
    assert.equal((await alice.getPresence(bob.getUserId())).status_msg, "at lunch");

    const got = new Promise((resolve) => bob.on("toDeviceEvent", (it) => it.getType() === "org.example.test" && resolve(it)));
    await alice.sendToDevice("org.example.test", new Map([[bob.getUserId(), new Map([[bob.getDeviceId(), { a: 1 }]])]]));
    assert.deepEqual((await got).getContent(), { a: 1 });

    await alice.setAccountData("org.example.test", { colour: "blue" });
    await until(() => alice.getAccountData("org.example.test")?.getContent().colour === "blue", "alice sees her data");

    await alice.addPushRule("global", "room", room, { actions: ["notify"] });
    assert((await alice.getPushRules()).global.room.some((rule) => rule.rule_id === room));
    await alice.deletePushRule("global", "room", room);
}

async function media(alice, bob) {
    const sent = randomBytes(300_000);
    const { content_uri: uri } = await alice.uploadContent(sent, { type: "application/octet-stream" });
    const url = bob.mxcUrlToHttp(uri, undefined, undefined, undefined, false, true, true);
    const answer = await fetchFn(url, { headers: { Authorization: `Bearer ${bob.getAccessToken()}` } });
    assert(sent.equals(Buffer.from(await answer.arrayBuffer())));
}

async function find(alice, bob, room) {
    const wanted = { room_events: { search_term: "morning", filter: { rooms: [room] } } };
    const { search_categories: found } = await alice.search({ body: { search_categories: wanted } });
    assert.equal(found.room_events.count, 1);
    const name = bob.getUserIdLocalpart();
    await until(async () => (await alice.searchUserDirectory({ term: name })).results.length, "the directory has bob");
}

async function whisper(alice, bob) {
    const encryption = { type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } };
    const room = await meet(alice, bob, { initial_state: [encryption] });
    const { event_id: id } = await alice.sendTextMessage(room, "nobody else shall know");
    const heard = () => bob.getRoom(room).findEventById(id);
    await until(() => heard()?.getContent().body === "nobody else shall know", "bob decrypts what alice said");
    assert(heard().isEncrypted());
}

async function main() {
    const [alice, bob] = [await registerAndLogIn(), await registerAndLogIn()];
    const view = { ranges: [[0, 20]], timeline_limit: 20, required_state: [["*", "*"]] };
    const slidingSync = new SlidingSync(baseUrl, new Map([["all", view]]), view, bob, 10_000);
    await alice.startClient({ pollTimeout: 10_000 });
    await bob.startClient({ slidingSync });
    const room = await meet(alice, bob);
    await talk(alice, bob, room);
    await settings(alice, bob, room);
    await media(alice, bob);
    await find(alice, bob, room);
    await whisper(alice, bob);
    for (const person of [alice, bob]) {
        await person.logout(true);
        await assert.rejects(person.whoami(), { errcode: "M_UNKNOWN_TOKEN" });
    }
}

// The library leaves timers behind, which would keep the process.
main().then(() => process.exit());
