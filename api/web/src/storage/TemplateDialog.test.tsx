// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { screen, waitFor } from '@testing-library/react';
import { userEvent } from '@testing-library/user-event';
import { expect, it } from 'vitest';

import { renderPage, serve } from '../test/render';
import { ContentTab } from './ContentTab';

const ROW = { template: 'small_1_amd64.tar.gz', package: 'small', version: '1', section: 'system', headline: 'A small one.', description: 'It is small.' };

it('downloads a template of the index, and shows what is wrong with it at its field', async () => {
  const changes = serve({
    'GET /nodes/n1/aplinfo': () => ({ body: { data: [ROW] } }),
    'POST /nodes/n1/aplinfo': () => ({ status: 400, body: { message: 'Parameter verification failed.', errors: { template: 'no such template' } } }),
  });
  const user = userEvent.setup();
  renderPage(<ContentTab node="n1" storage="local" contents={['vztmpl']} />);
  await user.click(await screen.findByRole('button', { name: 'Templates' }));
  await user.click(await screen.findByRole('combobox', { name: /^Template/ }));
  await user.click(await screen.findByText('small 1'));
  await screen.findByText('A small one.');
  await user.click(screen.getByRole('button', { name: 'Download' }));
  await waitFor(() => expect(changes).toHaveLength(1));
  expect(changes[0]?.parameters).toEqual({ storage: 'local', template: 'small_1_amd64.tar.gz' });
  await screen.findByText('no such template');
}, 20_000);

it('says what to do where no index is configured, and fetches those that are', async () => {
  const changes = serve({
    'GET /nodes/n1/aplinfo': () => ({ status: 500, body: { message: 'no index of container templates is configured' } }),
    'PUT /nodes/n1/aplinfo': () => ({ status: 403, body: { message: 'Permission check failed' } }),
  });
  const user = userEvent.setup();
  renderPage(<ContentTab node="n1" storage="local" contents={['vztmpl']} />);
  await user.click(await screen.findByRole('button', { name: 'Templates' }));
  await screen.findByText(/no index of container templates is configured/);
  await user.click(screen.getByRole('button', { name: 'Refresh them' }));
  await waitFor(() => expect(changes.map((change) => change.method)).toEqual(['PUT']));
  await screen.findByText(/Permission check failed/);
}, 20_000);
