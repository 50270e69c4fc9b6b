// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { screen, waitFor } from '@testing-library/react';
import { userEvent } from '@testing-library/user-event';
import { expect, it } from 'vitest';

import { renderPage, serve } from '../test/render';
import { ContentTab } from './ContentTab';

it('pulls an image by its reference, and shows what is wrong with it at its field', async () => {
  const changes = serve({
    'POST /nodes/n1/storage/local/oci-registry-pull': () => ({ status: 400, body: { message: 'Parameter verification failed.', errors: { reference: 'invalid reference format' } } }),
  });
  const user = userEvent.setup();
  renderPage(<ContentTab node="n1" storage="local" contents={['vztmpl']} />);
  await user.click(await screen.findByRole('button', { name: 'Pull an image' }));
  await user.type(await screen.findByLabelText(/^Reference/), 'registry.example/Team');
  await user.click(screen.getByRole('button', { name: 'Pull' }));
  await waitFor(() => expect(changes).toHaveLength(1));
  expect(changes[0]?.parameters).toEqual({ reference: 'registry.example/Team' });
  await screen.findByText('invalid reference format');
  await user.type(screen.getByLabelText('File name'), 'team.tar');
  await user.click(screen.getByRole('button', { name: 'Pull' }));
  await waitFor(() => expect(changes[1]?.parameters['filename']).toBe('team.tar'));
}, 20_000);

it('pulls nothing into a storage without templates', async () => {
  serve({});
  renderPage(<ContentTab node="n1" storage="disks" contents={['images']} />);
  expect(((await screen.findByRole('button', { name: 'Pull an image' })) as HTMLButtonElement).disabled).toBe(true);
});
