// Logs in with ImapFlow, appends a message, reads it back, waits for another one in IDLE, and prints the results as JSON.
// The first argument is the task as JSON, the second the folder that contains the library.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const task = JSON.parse(process.argv[2]);
const { ImapFlow } = createRequire(process.argv[3] + "/")("imapflow");

const client = new ImapFlow({
    host: "localhost",
    port: task.port,
    secure: task.secure,
    doSTARTTLS: task.secure ? undefined : true,
    tls: { ca: readFileSync(task.ca) },
    auth: task.auth,
    clientInfo: { name: "a test" },
    logger: false,
});
client.on("error", () => {}); // The failing call reports it.

try {
    await client.connect();
    const lock = await client.getMailboxLock("INBOX");
    await client.append("INBOX", task.message);
    const found = await client.search({ subject: task.subject });
    const { envelope, source } = await client.fetchOne(found.at(-1), { envelope: true, source: true });
    const news = new Promise(resolve => client.once("exists", resolve));
    const idle = client.idle();
    console.log(JSON.stringify({ idle: true }));
    const { count } = await news;
    await client.noop(); // Ends IDLE.
    await idle;
    lock.release();
    await client.logout();
    console.log(JSON.stringify({
        subject: envelope.subject,
        size: source.length,
        count,
        capabilities: [...client.capabilities.keys()],
    }));
} catch (error) {
    console.log(JSON.stringify({
        refused: error.authenticationFailed === true,
        code: error.serverResponseCode,
        oauth: error.oauthError,
        error: error.message,
    }));
    client.close();
}
