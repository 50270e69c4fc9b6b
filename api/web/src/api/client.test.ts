// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { afterEach, expect, it, vi } from 'vitest';

import { ApiError, call, errorText, path } from './client';
import { session } from './session';

function answer(status: number, body: unknown, statusText = ''): void {
  vi.stubGlobal('fetch', vi.fn(async () => new Response(JSON.stringify(body), { status, statusText })));
}

afterEach(() => {
  vi.unstubAllGlobals();
  session.end(null);
});

it('escapes what it puts into a path', () => {
  expect(path`/nodes/${'n1'}/storage/${'local'}/content/${'local:iso/a b.iso'}`).toBe('/nodes/n1/storage/local/content/local%3Aiso%2Fa%20b.iso');
});

it("throws the server's message and its text for each parameter", async () => {
  answer(400, { data: null, message: 'Parameter verification failed.\n', errors: { vmid: 'already used\n' } });
  const error = await call('POST', '/nodes/n1/lxc', { vmid: 100 }).catch((thrown: unknown) => thrown);
  expect(error).toBeInstanceOf(ApiError);
  expect((error as ApiError).errors).toEqual({ vmid: 'already used' });
  expect(errorText(error)).toBe('Parameter verification failed.\nvmid: already used');
});

it('falls back to the reason phrase when there is no message', async () => {
  answer(500, { data: null }, 'QEMU guest agent is not running');
  await expect(call('GET', '/x')).rejects.toThrow('QEMU guest agent is not running');
});

it('sends the CSRF token with changes only, and ends the session when it is refused', async () => {
  session.begin({ username: 'root@pam', ticket: 'PVE:root@pam:1::x', CSRFPreventionToken: 'token' });
  answer(200, { data: null });
  await call('GET', '/version');
  await call('PUT', '/x', { a: true, b: undefined });
  const [get, put] = vi.mocked(fetch).mock.calls.map(([, init]) => init!);
  expect(get!.headers).toEqual({});
  expect(put!.headers).toEqual({ CSRFPreventionToken: 'token' });
  expect(String(put!.body)).toBe('a=1');
  answer(401, { data: null }, 'permission denied - invalid PVE ticket');
  await call('GET', '/version').catch(() => undefined);
  expect(session.current).toBeNull();
  expect(session.endReason).toContain('sign in again');
});
